"""Scoring speech: prompts, takes, one module a metric, run folders, summaries and reports."""
