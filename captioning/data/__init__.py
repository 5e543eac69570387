"""What enters the model: vocabulary, encoded captions, image preprocessing, batches."""
