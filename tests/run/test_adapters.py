"""Many adapters in one engine: each answer is what PEFT's model alone would say, whatever else is served."""

import random
from weakref import WeakSet

import pytest
import torch

import satchel
from satchel.adapt import load_peft, outline_peft, save_peft
from satchel.core.book import make
from satchel.core.errors import ModelError, UnknownName, UserError
from satchel.core.request import Request, Sampling
from satchel.model.adapters import attach
from satchel.model.bank import Bank, Banked
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.stored import Reader
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from tests.run.toys import toy_decoder

PROMPT = tuple(range(5, 40))
LLAMA = {"model_type": "llama", "vocab_size": 132, "hidden_size": 32, "intermediate_size": 48, "rms_norm_eps": 1e-6}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
LLAMA |= {"max_position_embeddings": 256, "hidden_act": "silu", "rope_theta": 1e4}


def llama():
    """A toy that transformers knows, too."""
    decoder = Decoder(ModelConfig.from_hf(LLAMA))
    decoder.init_weights(torch.Generator().manual_seed(7), std=0.1)
    return decoder


def write_adapter(folder, rank, seed, spelling="lora", targets="", make_model=toy_decoder):
    model = make_model()
    method = make("adapter", f"{spelling}:rank={rank}" + (f",targets={targets}" if targets else ""))
    attach(model, method, torch.Generator().manual_seed(seed))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("B_OR"):
                parameter.normal_(0, 0.3, generator=rng)
    save_peft(model, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapters of ranks 1 to 40."""
    home, kinds = tmp_path_factory.mktemp("adapters"), ("lora", "rslora")
    ranks = (1, 4, 4, 8, 9, 16, 40, 2)
    targets = ("", "q_proj+v_proj")
    return [write_adapter(home / f"a{i}", r, i, kinds[i % 2], targets[i % 3 == 2]) for i, r in enumerate(ranks)]


def engine(folders=(), make_model=toy_decoder, **limits):
    served = Engine(make_model(), Limits(**({"blocks": 200, "batch": 8, "step_tokens": 64, "context": 256} | limits)))
    for folder in folders:
        served.register(folder.name, folder)
    return served


def answers(served, requests):
    ids = [served.submit(request) for request in requests]
    events = served.run()
    served.check_integrity()
    return [[t for e in events if e.id == id for t in e.tokens] for id in ids]


def peft_model(folder):
    model = toy_decoder()
    load_peft(model, folder)
    return model.eval()


def test_a_mixed_batch_gives_each_the_logits_of_its_adapter_alone(folders):
    served = engine(folders)
    for folder in [None, *folders]:
        served.submit(
            Request(
                prompt=PROMPT, max_tokens=3, logprobs=2, prompt_logprobs=True, adapter=folder.name if folder else ""
            )
        )
    events = served.run()
    for id, folder in enumerate([None, *folders]):
        model = peft_model(folder) if folder else toy_decoder()
        mine = [e for e in events if e.id == id]
        said = [t for e in mine for t in e.tokens]
        found = [*mine[0].prompt_logprobs[1:], *(logprob for e in mine for logprob in e.logprobs)]
        with torch.no_grad():
            expected_TV = model(torch.tensor([[*PROMPT, *said]]))[0].log_softmax(-1)
        for at, (token, logprob) in enumerate(zip([*PROMPT, *said][1:], found, strict=True)):
            assert logprob.logprob == pytest.approx(float(expected_TV[at, token]), abs=1e-4)
    served.check_integrity()


@pytest.mark.parametrize("blocks", [200, 60])
def test_answers_do_not_depend_on_who_else_is_served_or_on_how_much_fits(folders, blocks):
    """In the small pool a few adapters fit at once, and blocks have to move out of their way."""
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(4, 60) for _ in range(rng.randint(1, 40))) for _ in range(24)]
    requests = [
        Request(
            prompt=prompt,
            max_tokens=rng.randint(1, 30),
            adapter=rng.choice(["", *(f.name for f in folders)]),
            sampling=Sampling(temperature=rng.choice([0.0, 0.9]), seed=4),
        )
        for prompt in prompts
    ]
    served = engine(folders, blocks=blocks)
    said = answers(served, requests)
    assert served.stats()["adapter_loads"] >= len({r.adapter for r in requests} - {""})
    if blocks == 60:
        assert served.stats()["adapter_loads"] > len(folders)
    for request, tokens in zip(requests[::3], said[::3], strict=True):
        assert answers(engine(folders, batch=1), [request]) == [tokens]


def test_equal_beginnings_of_different_adapters_share_nothing(folders):
    served = engine(folders)
    first, second = (Request(prompt=PROMPT, max_tokens=4, adapter=f.name) for f in folders[3:5])
    alone = [answers(engine(folders), [request])[0] for request in (first, second)]
    assert [answers(served, [first])[0], answers(served, [second])[0]] == alone
    assert served.stats()["reused"] == 0
    assert answers(served, [first])[0] == alone[0] and served.stats()["reused"] == 32


def test_an_adapter_under_an_old_name_is_another_adapter(folders, tmp_path):
    """What is under way keeps the old one, and what comes later finds nothing of it."""
    served = engine()
    served.register("mine", folders[3])
    request = Request(prompt=PROMPT, max_tokens=12, adapter="mine")
    id = served.submit(request)
    events = served.step()
    served.unregister("mine")
    with pytest.raises(UnknownName):
        served.submit(request)
    served.register("mine", folders[4])
    later = served.submit(request)
    events += served.run()
    for one, folder in ((id, folders[3]), (later, folders[4])):
        expected = answers(engine([folder]), [Request(prompt=PROMPT, max_tokens=12, adapter=folder.name)])
        assert [t for e in events if e.id == one for t in e.tokens] == expected[0]


def test_a_thousand_adapters_may_be_registered_and_few_are_in_memory(folders):
    served = engine(blocks=80)
    for i in range(300):
        served.register(f"n{i}", folders[i % len(folders)])
    said = answers(
        served, [Request(prompt=(5, i % 50 + 4), max_tokens=2, adapter=f"n{i * 7 % 300}") for i in range(40)]
    )
    assert all(len(tokens) == 2 for tokens in said)
    assert served.stats()["adapters"] == 300 and served.stats()["adapters_resident"] < 40


def test_no_adapter_is_in_memory_beside_the_pool(folders, monkeypatch):
    """Registering one reads headers; one that is needed goes into the pool map by map."""
    held, most, read = WeakSet(), [], Reader.read

    def reading(reader, part, out):
        held.add(out)
        most.append(sum(tensor.numel() for tensor in held))
        read(reader, part, out)

    monkeypatch.setattr(Reader, "read", reading)
    served = engine(folders)
    assert not most
    served.submit(Request(prompt=PROMPT, max_tokens=2, adapter="a6"))
    served.run()
    low = max(outline_peft(toy_decoder(), folders[6]).values(), key=lambda low: low.A_RI.numel() + low.B_OR.numel())
    assert 0 < max(most) <= 2 * (low.A_RI.numel() + low.B_OR.numel())  # one map, and the next


def test_an_adapter_that_was_changed_behind_our_back_fails_its_requests_only(folders, tmp_path):
    folder = write_adapter(tmp_path / "moving", 4, 5)
    served = engine([folder])
    write_adapter(folder, 4, 6)
    bad, good = (
        served.submit(Request(prompt=(5, 6), max_tokens=2, adapter="moving")),
        served.submit(Request(prompt=(5, 6), max_tokens=2)),
    )
    finished = {e.id: e for e in served.run() if e.finish}
    assert finished[bad].finish == "error" and "has changed" in finished[bad].error
    assert finished[good].finish == "length"
    served.check_integrity()


def test_what_is_no_adapter_of_this_model_is_refused_and_changes_nothing(folders, tmp_path):
    served = engine(folders[:1])
    with pytest.raises(UserError, match="'a0' is registered already"):
        served.register("a0", folders[1])
    with pytest.raises(ModelError, match="not an adapter"):
        served.register("x", tmp_path)
    with pytest.raises(ModelError, match="DoRA"):
        served.register("x", write_adapter(tmp_path / "dora", 2, 1, "dora"))
    with pytest.raises(ModelError, match="needs .* blocks and the pool has 8"):
        engine([folders[6]], blocks=8)
    with pytest.raises(UnknownName, match="did you mean 'a0'"):
        served.submit(Request(prompt=(5,), max_tokens=2, adapter="a00"))
    with pytest.raises(UnknownName):
        engine().submit(Request(prompt=(5,), max_tokens=2, adapter="a0"))
    assert served.stats()["adapters"] == 1 and served.idle


def test_thirty_two_in_one_batch_give_what_peft_gives_each_alone(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folders = [
        write_adapter(tmp_path / f"b{i}", (1, 4, 16, 24)[i % 4], i, ("lora", "rslora")[i % 2]) for i in range(32)
    ]
    served = engine(folders, llama, blocks=1200, batch=32, step_tokens=32 * len(PROMPT))
    ids = [
        served.submit(Request(prompt=PROMPT[i:], max_tokens=1, prompt_logprobs=True, adapter=f"b{i}"))
        for i in range(32)
    ]
    said = {event.id: event for event in served.step()}
    assert len(said) == 32, "all of them in one step"
    served.check_integrity()
    base = transformers.AutoModelForCausalLM.from_pretrained(satchel.save(llama(), tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(base, folders[0], adapter_name="b0")
    for i, id in enumerate(ids):
        if i:
            theirs.load_adapter(folders[i], adapter_name=f"b{i}")
        theirs.set_adapter(f"b{i}")
        with torch.no_grad():
            expected_TV = theirs(torch.tensor([PROMPT[i:]])).logits[0].log_softmax(-1)
        for at, logprob in enumerate(said[id].prompt_logprobs[1:]):
            assert logprob.logprob == pytest.approx(float(expected_TV[at, PROMPT[i + at + 1]]), abs=1e-4)


def test_adapters_stand_beside_weights_in_the_blocks_of_a_file():
    """Embeddings in blocks hold a linear map, which is none to adapt."""
    decoder = toy_decoder()
    wrapped = torch.nn.Module()
    wrapped.base = torch.nn.Linear(32, 132)
    decoder.model.embed_tokens = wrapped
    Bank(decoder, torch.zeros(4, 8))
    assert isinstance(wrapped.base, torch.nn.Linear)
    assert sum(isinstance(module, Banked) for module in decoder.modules()) == 14
