"""Runs of test-time adaptation and domain generalisation: data, methods, reports."""
