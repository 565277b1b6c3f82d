"""A real tracker behind a model that answers with the logits it was given, for tests of sessions."""

from visa_hf import VisaConfig
from visa_hf.modeling.video_answering_visa import Answer
from visa_hf.modeling.video_asking_visa import VisaAskingMixin
from visa_hf.modeling.video_tracking_visa import VisaTrackingMixin


class StubModel(VisaAskingMixin, VisaTrackingMixin):
    """Takes the place of the model where only the tracker matters."""

    score = 0.25

    def __init__(self, tracker, mask_logits=None):
        self.config = VisaConfig.tiny()
        self.tracker = tracker
        self.mask_logits = mask_logits

    def _answer(self, session, questions, generate_kwargs):
        self.asked = questions
        return [Answer("It is [SEG].", self.mask_logits, (self.score,) * len(self.mask_logits)) for _ in questions]


class Calls:
    """Counts calls of modules, and the rows of their first input, while it is open."""

    def __init__(self, **modules):
        self.calls = dict.fromkeys(modules, 0)
        self.rows = dict.fromkeys(modules, 0)
        self._handles = [
            module.register_forward_pre_hook(self._counter(name), with_kwargs=True) for name, module in modules.items()
        ]

    def _counter(self, name):
        def count(_module, args, kwargs):
            self.calls[name] += 1
            self.rows[name] += len(args[0] if args else kwargs["inputs_embeds"])

        return count

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for handle in self._handles:
            handle.remove()
