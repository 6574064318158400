"""Data preparation: recordings and transcripts in, a data set of codes and timed words out.

The stages in order: sources find recordings, transcripts say what is said in them, aligners when,
checks refuse what cannot be learned from, encode makes codes, shards keep finished work, and
program runs them.
"""
