"""Measuring an adapter at every rank."""
