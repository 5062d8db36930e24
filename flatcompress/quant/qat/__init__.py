"""What takes part in quantization-aware training: scale conflicts (GAQAT), SAQ, oscillation, rounding, distillation."""
