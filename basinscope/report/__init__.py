"""Figures of stores and estimates."""
