"""llama.cpp's library and its files."""
