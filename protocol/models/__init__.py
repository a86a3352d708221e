"""Model files, the same for both sides. Importing this package loads nothing; torch only inside training's own modules.

engine       llama.cpp: answers with log-probabilities, swaps adapters     tokenizer   llama.cpp's own, so that ids never differ
spelling     which tokens may spell a verdict                              logits      a token, and how sure the model was of it
checkpoint   GGUF <-> metadata, vocabulary, tensors; quantising            lora         the factors, on a model and as a GGUF adapter
torch_model  a checkpoint as a torch model and back                        training     the one training loop
"""
