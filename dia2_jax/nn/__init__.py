"""Blocks that know neither Dia2 nor Mimi."""
