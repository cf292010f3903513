"""Tables, plots and contact sheets that commands print or draw."""
