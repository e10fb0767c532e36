"""SFT, then RAD-DPO, on a click log in JSONL: one line per visit, what was ordered and what was only seen."""

# %% The catalogue: an item is three codes, and each code is a token of the model.
import json
import random
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

import raddpo_ext as rx
from raddpo_ext.integrations.transformers import RADDPOConfig, RADDPOTrainer

set_seed(0)
folder = Path("train_example")
folder.mkdir(exist_ok=True)
vocab = rx.SIDVocab([8, 8, 8], offset=1)  # token 0 begins a prompt
sids = torch.cartesian_prod(*[torch.arange(8)] * 3)[torch.randperm(512)[:200]]
index = rx.TrieIndex.build(sids, vocab=vocab)

# %% A log: users stay with one first code. Replace it by your own.
with open(folder / "log.jsonl", "w") as file:
    for _ in range(220):
        kind = sids[random.randrange(200), 0]
        same, other = (torch.nonzero(mask)[:, 0].tolist() for mask in (sids[:, 0] == kind, sids[:, 0] != kind))
        *history, ordered = random.choices(same, k=4)
        seen = [item for item in random.sample(other, 3) + random.sample(same, 1) if item != ordered]
        file.write(json.dumps({"history": history, "ordered": ordered, "seen": seen}) + "\n")

# %% From item ids to token ids: a row is a prompt with its candidates.
tokens = vocab.encode(sids).tolist()
rows = []
for line in (folder / "log.jsonl").read_text().splitlines():
    visit = json.loads(line)
    rows.append(
        {
            "prompt_ids": [0] + [token for item in visit["history"] for token in tokens[item]],
            "positives": [tokens[visit["ordered"]]],
            "negatives": [tokens[item] for item in visit["seen"]],
        }
    )
train, test = rows[:200], rows[200:212]

# %% A model: a small random one here, from_pretrained in earnest.
size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=25, head_dim=16, max_position_embeddings=64, **size))


# %% Both stages use one trainer: without negatives the loss is SFT alone.
def stage(name: str, dataset: list[dict], steps: int, learning_rate: float) -> dict[str, float]:
    config = RADDPOConfig(
        output_dir=str(folder / name),
        max_steps=steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=16,
        eval_beam_width=20,
        eval_ks=[10],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = RADDPOTrainer(model, config, train_dataset=dataset, eval_dataset=test, index=index)
    trainer.train()
    return trainer.evaluate()


sft = stage("sft", [row | {"negatives": []} for row in train], steps=10, learning_rate=5e-3)
aligned = stage("rad_dpo", train, steps=5, learning_rate=5e-4)

# %% What came out: recall among the 10 best, and how often the ordered item beats a seen one.
for name, found in (("SFT", sft), ("RAD-DPO", aligned)):
    print(f"{name}: recall@10 {found['eval_sid_recall@10']:.2f}, accuracy {found['eval_rewards/accuracies']:.2f}")
model.save_pretrained(folder / "model")
index.save(folder / "catalogue.index")
