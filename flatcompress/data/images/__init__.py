"""The user's own images: folders, files, decoding, published test sets."""
