"""Programs that train: data preparation, decoder and codec. They run from a checkout."""
