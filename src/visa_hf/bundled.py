"""What the package carries: a small trained model, and a clip to try it on. Paths only; nothing is loaded here.

Both are of the synthetic world (`visa_hf.datasets_scripts.synthetic`). The model card beside the weights says what the
model can and cannot do; docs/reproduce.md how it was made.
"""

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"
# A folder for `from_pretrained`, of half-precision weights.
BUNDLED_MODEL = _ASSETS / "visa_synthetic"
# H.264; its scene is not among those that the model was trained on.
BUNDLED_CLIP = _ASSETS / "clip.mp4"
BUNDLED_NOTICE = (
    "No `model` was given: using the small bundled one, which knows drawn shapes only, not real videos. Give a "
    "checkpoint's folder or Hub id for those."
)
