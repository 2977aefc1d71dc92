"""What `gradmem demo` shows, one demonstration a file."""
