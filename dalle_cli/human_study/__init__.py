"""Blinded comparison of two systems' pictures by people: make the study, serve it, report the votes."""
