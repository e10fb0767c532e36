"""Alignment of Hugging Face models on packed sessions: a collator, the states of a model, and trainers."""

from raddpo_ext.integrations.base_model import logits_map
from raddpo_ext.integrations.policy_config import PolicyConfig
from raddpo_ext.integrations.policy_trainer import PolicyTrainer
from raddpo_ext.integrations.session_collator import SessionCollator
from raddpo_ext.integrations.session_states import (
    SessionStates,
    accept_sessions,
    check_lengths,
    session_states,
    verify_packing,
)
from raddpo_ext.integrations.trainer import RADDPOTrainer
from raddpo_ext.integrations.trainer_config import RADDPOConfig

__all__ = [
    "PolicyConfig",
    "PolicyTrainer",
    "RADDPOConfig",
    "RADDPOTrainer",
    "SessionCollator",
    "SessionStates",
    "accept_sessions",
    "check_lengths",
    "logits_map",
    "session_states",
    "verify_packing",
]
