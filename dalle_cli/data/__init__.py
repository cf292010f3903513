"""Sources of captioned pictures: formats, filters, statistics, batch order and loading."""
