"""Stages of ``python -m train.corpus``: text, speech, word times, recordings, tokenizer.

Text: `lexicon`, `cleaning`, `sources`, `grammar`, `pools`, `scripts`. Speech: `speech`, `piper`,
`second_voice`, `tones`, `word_times`. Recordings: `assembly`, `shards`, `program`. `bpe` trains
the tokenizer.
"""
