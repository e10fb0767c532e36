"""RAD-DPO in a plain loop, without transformers: any model that gives a hidden state for each token of a SID."""

import torch

import raddpo_ext as rx

torch.manual_seed(0)
vocab = rx.SIDVocab([16, 16, 16])
sessions = rx.SessionBatch(
    tokens=vocab.encode(torch.randint(16, (6, 3))),  # two sessions: one positive each, then three and one negatives
    lengths=torch.full((6,), 3),
    offsets=torch.tensor([0, 4, 6]),
    num_positives=torch.tensor([1, 1]),
)
states = torch.nn.Parameter(torch.randn(6, 3, 32))  # your model's: state i predicts token i
head = torch.nn.Linear(32, 48, bias=False)
optimizer = torch.optim.AdamW([states, *head.parameters()], lr=1e-2)
for step in range(30):
    logps = rx.linear_token_logps(states, head.weight, sessions.tokens)  # [6, 3]
    result = rx.rad_dpo_loss(logps, sessions, sft_weight=0.1)
    result.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == 29:
        print(f"step {step}: loss {result.loss.item():.3f}, accuracy {result.accuracy.item():.2f}")
