"""Conversion between weight layouts: rule tables, safetensors reading and writing, whole folders.

``rules`` is the engine, ``dia2``, ``mimi_hf`` and ``mimi_kyutai`` are the tables,
``safetensors_io`` the file format, ``load`` the streaming in and out, ``api`` the folders.
"""
