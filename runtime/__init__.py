"""What the heart stands on: errors, llama.cpp's library and files, what lies on disk, structured answers."""

__version__ = "0.1.0"
