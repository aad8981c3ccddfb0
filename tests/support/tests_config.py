"""The tiny sweep that tests run: real data, a model that trains in a second."""

TINY = {
    "name": "tiny",
    "subject": {"source": "small_cnn", "width": 4, "blocks": 1, "epochs": 3},
    "tasks": [
        {
            "name": "digits",
            "evaluator": "image_classification",
            "data": {"source": "sklearn", "name": "digits"},
            "splits": {
                "calibration": {"from": "train", "samples": 64, "seed": 0},
                "selection": {"from": "validation"},
                "confirmation": {"from": "test"},
            },
            "criteria": [
                {"metric": "accuracy", "max_drop": 0.05},
                {"metric": "weight_bytes", "max_ratio": 0.6},
            ],
        }
    ],
    "matrix": {
        "weights": {
            "format": ["int8", "int2"],
            "granularity": ["per_tensor", "per_channel"],
            "calibrator": ["minmax", "mse"],
        },
        "activations": {"format": ["int8", "none"]},
    },
}
