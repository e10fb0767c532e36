"""A retriever over a saved model and a saved index: ``python retrieve.py MODEL INDEX TOKEN...`` (see train.py)."""

import sys

import torch
from transformers import AutoModelForCausalLM

import raddpo_ext as rx

folder, file, *prompt = sys.argv[1:]
index = rx.TrieIndex.load(file)
retriever = rx.SIDRetriever(AutoModelForCausalLM.from_pretrained(folder).eval(), index, beam_width=20)
found = retriever.retrieve(torch.tensor([[int(token) for token in prompt]]), top_k=5)
for item, score, sid in zip(found.items[0].tolist(), found.scores[0].tolist(), found.sids[0].tolist(), strict=True):
    print(f"item {item}  SID {sid}  log-prob {score:.2f}")
