"""The codecs of weights, one per file."""
