"""A tiny BERT model from scratch, for tests that embed sentences."""

from pathlib import Path

from psychocounsel.records import write_manifest


def build_micro_embedder(folder: Path, words: list[str]) -> Path:
    """Write a model of one layer that knows some words and all letters; return its manifest.json."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    letters = [mark + letter for letter in "abcdefghijklmnopqrstuvwxyz.?!'" for mark in ("", "##")]
    vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters])
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    return write_manifest(folder)
