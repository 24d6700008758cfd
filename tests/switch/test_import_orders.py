"""A ChatGLM-6B checkpoint gets our classes and runs no code of its own, whatever was imported before us.

Each order of imports is one fresh process.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import remote_code

# Each leaves faster_chatglm_6b imported; argv[1] is a checkpoint whose code can be run. All then do the same, below.
IMPORT_ORDERS = {
    "ours first": "import faster_chatglm_6b",
    "transformers first": "import transformers, faster_chatglm_6b",
    "auto classes first": """
from transformers import AutoConfig, AutoModel, AutoTokenizer
import faster_chatglm_6b
""",
    "only auto_factory first": """
import transformers.models.auto.auto_factory
import faster_chatglm_6b
""",
    "a user's module bound the function": """
from types import ModuleType
user = sys.modules["user"] = ModuleType("user")
exec("from transformers.dynamic_module_utils import get_class_from_dynamic_module", user.__dict__)
import faster_chatglm_6b
found = user.get_class_from_dynamic_module("configuration_chatglm.ChatGLMConfig", sys.argv[2])
assert found.__module__ == "faster_chatglm_6b.configuration_chatglm", found
""",
    "twice and reloaded": """
import importlib
import faster_chatglm_6b
import transformers.models.auto.auto_factory as auto_factory
first = faster_chatglm_6b
importlib.reload(faster_chatglm_6b.hook)
importlib.reload(faster_chatglm_6b)
for name in [name for name in sys.modules if name.split(".")[0] == "faster_chatglm_6b"]:
    del sys.modules[name]
import faster_chatglm_6b
assert faster_chatglm_6b is not first
importlib.reload(faster_chatglm_6b.hook)
importlib.reload(faster_chatglm_6b)
original = auto_factory.get_class_from_dynamic_module.__faster_chatglm_6b_original__
assert original.__module__ == "transformers.dynamic_module_utils"
assert not hasattr(original, "__faster_chatglm_6b_original__"), "wrapped twice"
finders = [type(finder).__name__ for finder in sys.meta_path if type(finder).__module__ == "faster_chatglm_6b.hook"]
assert sorted(finders) == ["_Finder", "_HubModules"]
""",
    "its own code ran before": """
from transformers import AutoConfig, AutoModel, AutoTokenizer
for auto_class in (AutoConfig, AutoTokenizer):
    assert origin(auto_class.from_pretrained(sys.argv[1], trust_remote_code=True)) == "transformers_modules"
own_config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
assert origin(AutoModel.from_config(own_config, trust_remote_code=True)) == "transformers_modules"
assert set(executed()) == {"configuration_chatglm.py", "tokenization_chatglm.py", "modeling_chatglm.py"}
import faster_chatglm_6b
sys.argv[2] = sys.argv[1]
""",
    "while another thread imports transformers": """
import importlib.machinery, threading, time
started = threading.Event()

class SlowLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        started.set()
        time.sleep(0.3)
        super().exec_module(module)

class SlowFinder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "transformers.dynamic_module_utils":
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            spec.loader = SlowLoader(name, spec.origin)
            return spec

sys.meta_path.insert(0, SlowFinder)
thread = threading.Thread(target=__import__, args=("transformers.models.auto.modeling_auto",))
thread.start()
started.wait()
assert not hasattr(sys.modules["transformers.dynamic_module_utils"], "get_class_from_dynamic_module")
import faster_chatglm_6b
thread.join()
""",
}
_LOAD_EVERYTHING = """
from transformers import AutoConfig, AutoModel, AutoTokenizer
executed_before = executed()
loaded = [
    auto_class.from_pretrained(sys.argv[2], trust_remote_code=True)
    for auto_class in (AutoTokenizer, AutoConfig, AutoModel)
]
again = AutoModel.from_config(loaded[1], trust_remote_code=True)
answer({
    "classes": [type(value).__name__ for value in (*loaded, again)],
    "origins": sorted({origin(value) for value in (*loaded, again)}),
    "executed": executed()[len(executed_before):],
})
"""


@pytest.fixture(scope="module")
def tripwires(tmp_path_factory, golden_dir):
    """Return a ChatGLM-6B checkpoint whose code must not run."""
    directory = tmp_path_factory.mktemp("checkpoints") / "chatglm-6b"
    return remote_code.chatglm_6b_with_tripwires(directory, golden_dir / "ckpt" / "tiny")


@pytest.fixture(scope="module")
def import_orders(tmp_path_factory, golden_dir, tripwires):
    """Return each import order's answer or error. Two run at a time, as most of it is importing transformers."""
    directory = tmp_path_factory.mktemp("orders")
    working = remote_code.chatglm_6b(directory / "working", golden_dir / "ckpt" / "tiny")
    remote_code.add_working_code(working)

    def run(order):
        source = "import sys\n" + IMPORT_ORDERS[order] + _LOAD_EVERYTHING
        try:
            return remote_code.run_python(source, directory / order.replace(" ", "_"), working, tripwires)
        except AssertionError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(IMPORT_ORDERS, pool.map(run, IMPORT_ORDERS), strict=True))


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_import_order(order, import_orders):
    if isinstance(import_orders[order], AssertionError):
        raise import_orders[order]
    assert import_orders[order] == {
        "classes": [
            "ChatGLMTokenizer",
            "ChatGLMConfig",
            "ChatGLMForConditionalGeneration",
            "ChatGLMForConditionalGeneration",
        ],
        "origins": ["faster_chatglm_6b"],
        "executed": [],
    }
