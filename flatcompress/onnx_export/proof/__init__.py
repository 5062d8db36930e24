"""The certificate: does the file compute what the reference computes? Written at export, repeated anywhere."""
