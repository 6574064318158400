"""Kyutai's Mimi codec: waveform to codes and back, whole and streaming."""
