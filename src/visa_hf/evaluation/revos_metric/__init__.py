"""The `evaluate` module of ReVOS' measures: `evaluate.load(visa_hf.evaluation.REVOS_METRIC)`."""
