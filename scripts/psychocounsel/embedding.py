"""Sentence embeddings of a local BERT model, as sentence-transformers makes them: the mean of the last layer, scaled to length one."""

import os
from pathlib import Path

import numpy as np

MAX_TOKENS = 128  # a speech of the paper's mean length has 80; the rest of a longer one is not read
BATCH = 32


def embed(folder: Path, texts: list[str]) -> np.ndarray:
    """Return the embeddings of texts by the model in a folder, float32 [texts, dimensions].

    On a CPU, so that they are the same everywhere up to rounding. Texts of like length share a batch, with little padding.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    embeddings = np.zeros((len(texts), model.config.hidden_size), np.float32)
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            batch = by_length[start : start + BATCH]
            tokens = tokenizer([texts[i] for i in batch], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            inside = tokens["attention_mask"].unsqueeze(-1)
            mean = (model(**tokens).last_hidden_state * inside).sum(1) / inside.sum(1)
            embeddings[batch] = torch.nn.functional.normalize(mean, dim=1).numpy()
    return embeddings
