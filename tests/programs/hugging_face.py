"""A Llama of HuggingFace transformers, built from a config, trained a few steps; then it generates."""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cpu")
device = torch.device(parser.parse_args().device)

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip
model = LlamaForCausalLM(config).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
tokens = torch.randint(96, (4, 24)).to(device)

for step in range(6):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.6f}")
model.eval()
written = model.generate(tokens[:1, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
print("tokens", written[0].tolist())
