"""What the student is: vocabulary, blocks, widths, weight types, and the file it becomes."""
