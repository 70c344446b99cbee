"""What a denoiser and a policy of your own must offer, the calls of them, and the checks before."""

from polygrad_fast.protocols.checks import check_normalizer, check_trainable, dry_call
from polygrad_fast.protocols.denoiser import Denoiser, call_denoiser, check_denoiser
from polygrad_fast.protocols.policy import Policy, check_policy, policy_moments, reads_normalized

__all__ = [
    "Denoiser",
    "Policy",
    "call_denoiser",
    "check_denoiser",
    "check_normalizer",
    "check_policy",
    "check_trainable",
    "dry_call",
    "policy_moments",
    "reads_normalized",
]
