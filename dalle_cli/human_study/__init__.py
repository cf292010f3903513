"""Blinded comparison of two systems' pictures by people: making the study, serving it, reporting the votes."""
