"""The Dia2 network: temporal decoder, depformer, delays."""
