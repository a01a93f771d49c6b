"""Chips that torch does not know, as torch devices."""
