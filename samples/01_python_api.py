"""Convert a checkpoint and write a few words with it: python samples/01_python_api.py MODEL OUT."""

from __future__ import annotations

import sys

from transformers import AutoTokenizer

from converter import Recipe, convert, load

model, out = sys.argv[1:3]
recipe = Recipe().replace({"pattern": "8:16", "mitigation": "d_pts+var"})
folder = convert(model, out, recipe)

tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("The capital of France is", return_tensors="pt")
sparse = load(folder)  # a transformers model whose forward is an ONNX Runtime session
ids = sparse.generate(
    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8, do_sample=False
)
print(tokenizer.decode(ids[0]))
