"""The model: image encoder, caption decoder, and the search for a caption."""
