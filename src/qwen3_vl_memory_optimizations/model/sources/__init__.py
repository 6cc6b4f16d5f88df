"""Where models come from: paths, ids of the Hugging Face Hub, downloads, and what is on this machine."""
