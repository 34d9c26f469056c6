"""What `transformers` makes of a folder, asked by `parity` in a process of its own: it knows nothing of our code.

    python -m pretrain.hub.reference REQUEST.json

The request (a JSON object) names the `folder`, the `dtype` of its files, the `auto_class` and its `arguments`, the
folder `output`, batches of token ids, texts, a long one and prompts; computed is in fp32. Answered are answer.json (how
the weights loaded, the names of the labels, the ids and the decoded text of each text, where a long one is cut, what
continues each prompt) and BATCH.NAME.npy for each tensor that the model gives for a batch.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

OUTPUTS = ("logits", "last_hidden_state", "pooler_output", "sentence_embedding")


def main() -> None:
    import transformers

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    output = Path(request["output"])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    answer: dict[str, Any] = {"transformers": transformers.__version__}
    tokenizer = transformers.AutoTokenizer.from_pretrained(request["folder"])
    answer["cut"] = tokenizer(request["long_text"], truncation=True)["input_ids"]
    answer["texts"] = [tokens_of(tokenizer, text) for text in request["texts"]]
    model, loading = getattr(transformers, request["auto_class"]).from_pretrained(
        request["folder"], dtype=getattr(torch, request["dtype"]), use_safetensors=True, output_loading_info=True,
        **request["arguments"],
    )  # fmt: skip
    compute_in_fp32(model)
    answer["class"] = type(model).__name__
    answer["labels"] = [model.config.id2label[number] for number in range(model.config.num_labels)]
    answer["loading"] = {kind: sorted(map(str, found)) for kind, found in loading.items()}
    model.eval()
    with torch.inference_mode():
        for index, batch in enumerate(request["batches"]):
            inputs = {name: torch.tensor(rows) for name, rows in batch.items()}
            made = dict(model(**inputs))
            if "start_logits" in made:
                made["logits"] = torch.stack((made["start_logits"], made["end_logits"]), -1)
            if request["is_embedding"]:
                mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
                made["sentence_embedding"] = embedding(request["folder"], made["last_hidden_state"], mask)
            for name in OUTPUTS:
                if made.get(name) is not None:
                    np.save(output / f"{index}.{name}.npy", made[name].numpy(), allow_pickle=False)
        if request["prompts"]:
            model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
        answer["continuations"] = [continue_ids(model, prompt, request["new_tokens"]) for prompt in request["prompts"]]
    answer["continued_texts"] = [
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in answer["continuations"]
    ]
    (output / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def embedding(folder: str, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What sentence-transformers makes of hidden states, by the folder's 1_Pooling/config.json and its Normalize."""
    settings = json.loads((Path(folder) / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    mode = settings.get("pooling_mode") or next(key for key, value in settings.items() if "mode" in key and value)
    if "mean" in mode:
        pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    else:
        last = mask.sum(1) - 1
        pooled = hidden[torch.arange(len(hidden)), last if "lasttoken" in mode else torch.zeros_like(last)]
    return torch.nn.functional.normalize(pooled, dim=1)


def compute_in_fp32(model: torch.nn.Module) -> None:
    """Each module widens its own weights while it computes: files of bf16 stay mapped instead of being copied whole."""
    for module in model.modules():
        own = {kind: value for kind, value in module._parameters.items() if value is not None}
        if all(value.dtype == torch.float32 for value in own.values()):
            continue

        def widen(module: torch.nn.Module, _, own=own) -> None:
            wide = {kind: torch.nn.Parameter(value.float(), requires_grad=False) for kind, value in own.items()}
            module._parameters.update(wide)

        def restore(module: torch.nn.Module, *_, own=own) -> None:
            module._parameters.update(own)

        module.register_forward_pre_hook(widen)
        module.register_forward_hook(restore)


def tokens_of(tokenizer: Any, text: str) -> dict[str, Any]:
    """The ids of a text, all of it text, and what they decode to.

    `as_called`: the ids that a user gets who sets nothing, special ones around the text included; None where the text
    holds what the tokenizer then takes for special tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    plain = tokenizer.split_special_tokens or not any(token in text for token in tokenizer.get_added_vocab())
    return {
        "ids": ids,
        "as_called": tokenizer(text)["input_ids"] if plain else None,
        "decoded": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    }


def continue_ids(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The likeliest continuation, with transformers' own generation and its cache."""
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens)
    return made[0, len(prompt) :].tolist()


if __name__ == "__main__":
    main()
