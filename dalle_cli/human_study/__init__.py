"""Blinded human comparison of two systems' pictures: make the study, serve it, report the votes."""
