"""The demo questions that ship beside the pair. Refuses to know how they are answered."""

from __future__ import annotations

import json
from pathlib import Path

DEMO_QUESTIONS = (
    "What does textwrap.dedent do?",
    "Explain itertools.groupby.",
    "What does functools.lru_cache do?",
    "How do I use subprocess.run?",
    "What does os.path.join do?",
    "What is collections.Counter?",
    "Tell me about threading.Thread.",
    "What is the asyncio module for?",
    "What does shutil.copytree do?",
    "Explain collections.OrderedDict.",
    "What is the itertools module for?",
    "What does json.dumps do?",
    "What does re.sub do?",
    "Explain heapq.merge.",
    "What is the textwrap module for?",
    "What does print do?",
    "Explain functools.reduce.",
    "What does functools.wraps do?",
    "What does os.walk do?",
    "What is the random module for?",
    "How do I use asyncio.gather?",
    "What does asyncio.wait_for do?",
    "Explain threading.Condition.",
    "What is collections.deque?",
    "What does bisect.bisect_left do?",
    "What does copy.deepcopy do?",
    "What is the math module for?",
    "What does shutil.rmtree do?",
    "How do I use tempfile.mkstemp?",
    "What does textwrap.wrap do?",
    "Explain inspect.signature.",
    "What does logging.basicConfig do?",
    "What is the statistics module for?",
    "What does csv.reader do?",
    "What does random.shuffle do?",
    "Explain contextlib.suppress.",
    "What does dataclasses.dataclass do?",
    "What does enum.unique do?",
    "What does urllib.parse.urlsplit do?",
    "What does sorted do?",
    "Explain map.",
    "What does str.split do?",
    "What does enumerate do?",
    "What is the signature of shutil.move?",
    "Show the source of textwrap.fill.",
    "Show the source of shutil.copy.",
    "What is the heapq module for?",
    "What does 'while' mean in Python?",
    "Explain os.makedirs.",
    "What does datetime.datetime.combine do?",
    "Tell me about asyncio.Queue.",
    "What does statistics.median do?",
)


# Wordings that no card has, to see what is left when the question is not known by heart.
UNSEEN_QUESTIONS = tuple(
    f"Please say briefly what {name} is good for."
    for name in (
        "textwrap.shorten",
        "itertools.islice",
        "functools.cmp_to_key",
        "subprocess.check_output",
        "os.path.splitext",
        "collections.ChainMap",
        "threading.Event",
        "shutil.which",
        "json.loads",
        "re.findall",
        "heapq.nlargest",
        "math.gcd",
        "random.sample",
        "asyncio.sleep",
        "bisect.insort",
        "copy.copy",
        "tempfile.TemporaryDirectory",
        "inspect.getsource",
        "logging.getLogger",
        "statistics.stdev",
        "csv.writer",
        "contextlib.closing",
        "dataclasses.replace",
        "enum.Enum",
        "urllib.parse.quote",
        "str.join",
        "list.sort",
        "dict.setdefault",
        "zipfile.ZipFile",
        "traceback.print_exc",
    )
)


def write_questions(path: Path) -> None:
    """Write the demo questions as JSON lines of ``id`` and ``prompt``."""
    lines = [
        json.dumps({"id": f"demo-{number:02d}", "prompt": question})
        for number, question in enumerate(DEMO_QUESTIONS, start=1)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
