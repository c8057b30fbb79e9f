"""OpenAI's grader objects, key by key, and graft's own beside them. `check_grader` is the way in.

Whatever OpenAI's fine-tuning API takes is taken as it is; what graft adds are more values of `type`. The classes
hold checked plain values; `build.py` makes of them what judges. Imports nothing heavy.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from graft.grading.formula import NAME, parse_formula
from graft.grading.template import parse_template

SOURCE_LIMIT = 256 * 1024
"""Bytes of a python grader's source."""


SAMPLE_KEYS = ("output_text", "output_json", "output_tools", "output_audio", "choices")
"""What `sample` holds; not all of it for every sample."""


def _template(text: str) -> str:
    for reference in parse_template(text).references:
        if reference.namespace == "sample" and reference.steps and reference.steps[0] not in SAMPLE_KEYS:
            raise ValueError(
                f"'{{{{{reference}}}}}', which no sample has; want one of sample.{', sample.'.join(SAMPLE_KEYS)}"
            )
    return text


Template = Annotated[str, AfterValidator(_template)]
"""Text with `{{item.*}}` and `{{sample.*}}`."""


def null_is(default: Any) -> BeforeValidator:
    """OpenAI's objects are echoed with null for what was left out."""
    return BeforeValidator(lambda value: default if value is None else value)


class Part(BaseModel):
    """Base of everything in a grader object: nothing unknown, nothing converted, nothing changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, serialize_by_alias=True)


class Named(Part):
    """What all graders may have."""

    name: str | None = Field(default=None, min_length=1)
    """For people; filled in where it is missing."""

    pass_threshold: FiniteFloat | None = None
    """Of OpenAI's evals, in the score's own units; without effect on the reward. The outermost grader's is what counts
    as solved, unless the settings say."""


class StringCheck(Named):
    """1 if two texts agree, else 0."""

    type: Literal["string_check"]
    input: Template
    reference: Template
    operation: Literal["eq", "ne", "like", "ilike"]
    """`eq`, `ne`: equal or not; `like`: the input contains the reference; `ilike`: whatever the case."""

    @field_validator("operation", mode="before")
    @classmethod
    def _not_neq(cls, value: Any) -> Any:
        if value == "neq":
            raise ValueError(
                '"neq", which one of OpenAI\'s guides prints; want "ne", which is what its API takes'
            )
        return value


Metric = Literal[
    "cosine",
    "fuzzy_match",
    "bleu",
    "gleu",
    "meteor",
    "rouge_1",
    "rouge_2",
    "rouge_3",
    "rouge_4",
    "rouge_5",
    "rouge_l",
]


class TextSimilarity(Named):
    """How alike two texts are, from 0 to 1; `text.py` defines each metric."""

    type: Literal["text_similarity"]
    input: Template
    reference: Template
    evaluation_metric: Metric


class TextPart(Part):
    """Text in a message."""

    type: Literal["input_text", "output_text"]
    text: Template


class ImagePart(Part):
    """An image in a message."""

    type: Literal["input_image"]
    image_url: Template
    detail: Annotated[Literal["auto", "low", "high"], null_is("auto")] = "auto"


class Audio(Part):
    """Sound, base64."""

    data: str
    format: Literal["mp3", "wav"]


class AudioPart(Part):
    """Sound in a message."""

    type: Literal["input_audio"]
    input_audio: Audio


MessagePart = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]


def _kind_of_content(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list) else "part"


_TextOrPart = Annotated[
    Annotated[Template, Tag("text")] | Annotated[MessagePart, Tag("part")], Discriminator(_kind_of_content)
]
Content = Annotated[
    Annotated[Template, Tag("text")]
    | Annotated[MessagePart, Tag("part")]
    | Annotated[list[_TextOrPart], Field(min_length=1), Tag("list")],
    Discriminator(_kind_of_content),
]


class InputMessage(Part):
    """One message to a judge."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    type: Literal["message"] | None = None


class SamplingParams(Part):
    """How a judge samples. What is left out is not sent."""

    seed: int | None = None
    top_p: FiniteFloat | None = None
    temperature: FiniteFloat | None = None
    max_completions_tokens: int | None = Field(
        default=None,
        ge=1,
        validation_alias=AliasChoices("max_completions_tokens", "max_completion_tokens", "max_tokens"),
    )
    """OpenAI's spelling; `max_completion_tokens` and `max_tokens` are read as the same."""

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ScoreModel(Named):
    """A judge model gives a number."""

    type: Literal["score_model"]
    input: list[InputMessage] = Field(min_length=1)
    model: str = Field(min_length=1)
    range: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2), null_is([0.0, 1.0])] = [0.0, 1.0]
    """Smallest and largest score; what lies outside is clipped to it."""

    sampling_params: SamplingParams | None = None

    @field_validator("range")
    @classmethod
    def _rises(cls, value: list[float]) -> list[float]:
        if value[0] >= value[1]:
            raise ValueError(f"{value}; want [smallest, largest] with smallest < largest")
        return value


class LabelModel(Named):
    """A judge model picks a label; 1 if it is one of the passing ones, else 0."""

    type: Literal["label_model"]
    input: list[InputMessage] = Field(min_length=1)
    model: str = Field(min_length=1)
    labels: list[str] = Field(min_length=1)
    passing_labels: list[str] = Field(min_length=1)
    sampling_params: SamplingParams | None = None
    """Not one of OpenAI's keys here; as for `score_model`."""

    @field_validator("labels")
    @classmethod
    def _differ(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a label twice; want labels that differ")
        return value

    @field_validator("passing_labels")
    @classmethod
    def _are_labels(cls, value: list[str], info: ValidationInfo) -> list[str]:
        unknown = [label for label in value if label not in info.data.get("labels", value)]
        if unknown:
            raise ValueError(f"{unknown[0]!r}; want only what is in labels, {info.data['labels']}")
        return value


class Python(Named):
    """A function `grade(sample, item)` that runs in the sandbox and returns a number."""

    type: Literal["python"]
    source: str
    image_tag: str | None = None
    """The sandbox image at OpenAI. Kept, and without effect."""

    @field_validator("source")
    @classmethod
    def _defines_grade(cls, value: str) -> str:
        if len(value.encode("utf-8", "replace")) > SOURCE_LIMIT:
            raise ValueError(f"more than {SOURCE_LIMIT} bytes; want a shorter source")
        try:
            tree = ast.parse(value)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = f" in line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            message = error.msg if isinstance(error, SyntaxError) else str(error)
            raise ValueError(
                f"a source with an error: {message}{line}; want Python that can be read"
            ) from None
        for statement in reversed(tree.body):  # the last one counts
            if not any(_binds_grade(node) for node in ast.walk(statement)):
                continue
            match statement:
                case ast.FunctionDef(name="grade", decorator_list=[]) if not _takes_two(statement.args):
                    raise ValueError(
                        f"other arguments in line {statement.lineno} of the source; want grade(sample, item)"
                    )
            return value
        raise ValueError("no function grade in the source; want grade(sample, item)")


def _takes_two(arguments: ast.arguments) -> bool:
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    needed = any(default is None for default in arguments.kw_defaults)
    return required <= 2 and (len(positional) >= 2 or arguments.vararg is not None) and not needed


def _binds_grade(node: ast.AST) -> bool:
    """Whether a statement gives the name `grade` a value in another way than a plain definition."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return any(alias.name == "*" or (alias.asname or alias.name) == "grade" for alias in node.names)
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name == "grade"
    return isinstance(node, ast.Name) and node.id == "grade" and isinstance(node.ctx, ast.Store)


OWN_HEADERS = ("connection", "content-length", "transfer-encoding")
"""What the body decides."""


class Endpoint(Named):
    """A service of one's own that is sent sample and row and answers with a score."""

    type: Literal["endpoint"]
    url: str
    headers: dict[str, str] | None = None
    rate_limit: FiniteFloat | None = Field(default=None, gt=0)
    """Requests a second."""

    @field_validator("url")
    @classmethod
    def _leads_somewhere(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is none, half an IPv6 address
            sound = False
        if not sound or not value.isprintable() or " " in value:
            raise ValueError(f"{json.dumps(value)}; want an address such as https://example.org/grade")
        return value

    @field_validator("headers")
    @classmethod
    def _can_be_sent(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name, text in (value or {}).items():
            if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII):
                raise ValueError(f"the name {name!r}; want a header's name: letters, digits and -")
            if name.lower() in OWN_HEADERS:
                raise ValueError(f"{name!r}, which is set by graft; want other headers alone")
            if not (text.isascii() and text.isprintable()):
                raise ValueError(f"a value of {name!r} that no header can have; want plain ASCII in one line")
        return value


# -- graft's own ----------------------------------------------------------------------------------------------


class Number(Named):
    """1 if the last number of the completion equals the row's, else 0."""

    type: Literal["number"]
    key: str = "answer"
    """Key of the row that holds the right number."""


class Math(Named):
    """1 if the completion's final expression means the same as the reference, else 0; LaTeX is understood."""

    type: Literal["math"]
    input: Template = "{{sample.output_text}}"
    reference: Template = "{{item.answer}}"


class Regex(Named):
    """1 if the pattern is found in the text, else 0."""

    type: Literal["regex"]
    pattern: str
    input: Template = "{{sample.output_text}}"
    whole: bool = False
    """Whether the pattern has to match the whole text."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        import regex

        try:
            regex.compile(value)
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{error}; want a regular expression of the regex library") from None
        return value


class JsonSchema(Named):
    """1 if the text is JSON that follows the schema, else 0."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] | bool = Field(alias="schema")
    input: Template = "{{sample.output_text}}"


class CodeTests(Named):
    """The share of the row's tests that the code in the text passes. Runs in the sandbox."""

    type: Literal["code_tests"]
    key: str = "tests"
    """The key of the row that holds the tests: a list of sources that raise when the code is wrong
    (`assert double(2) == 4`), and of `{"stdin": ..., "stdout": ...}` for programs."""

    input: Template = "{{sample.output_text}}"
    """Its last fenced block of Python is the code; all of it where there is no fence."""

    every: bool = False
    """1 if every test passes, else 0, instead of the share."""


class Function(Named):
    """A Python function of one's own, trusted and in this process."""

    type: Literal["function"]
    function: str
    """`package.module:function` or `file.py:function`, called as `function(completion, item)` or
    `function(completion, item, sample)`; returns a number."""

    timeout_s: FiniteFloat = Field(default=60.0, gt=0)
    """Longest time for one call."""

    @field_validator("function")
    @classmethod
    def _is_a_reference(cls, value: str) -> str:
        if not re.fullmatch(r"[^:].*:[^\W\d]\w*", value, re.DOTALL):
            raise ValueError(f"{value!r}; want 'package.module:function' or 'file.py:function'")
        return value


Member = (
    StringCheck
    | TextSimilarity
    | ScoreModel
    | LabelModel
    | Python
    | Endpoint
    | Number
    | Math
    | Regex
    | JsonSchema
    | CodeTests
    | Function
)
"""What may stand inside another grader."""


def _check_key(key: str) -> str:
    if not NAME.fullmatch(key):
        raise ValueError(f"the key {key!r}; want names of letters, digits and _, for the formula")
    return key


Members = dict[Annotated[str, AfterValidator(_check_key)], Annotated[Member, Field(discriminator="type")]]


class Multi(Named):
    """A formula over the scores of several graders."""

    type: Literal["multi"]
    graders: Members = Field(min_length=1)
    """Key -> grader; the keys are the formula's variables."""

    calculate_output: str

    @field_validator("calculate_output")
    @classmethod
    def _parses(cls, value: str, info: ValidationInfo) -> str:
        graders = info.data.get("graders")  # missing where they are wrong themselves
        parse_formula(value, None if graders is None else list(graders))
        return value


class Weighted(Named):
    """The weighted sum of several graders' scores."""

    type: Literal["weighted"]
    graders: Members = Field(min_length=1)
    weights: dict[str, FiniteFloat]
    """Key -> weight of its score; every grader has one."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> Weighted:
        if set(self.weights) != set(self.graders):
            raise ValueError(
                f"weights for {', '.join(self.weights)}; want one for each of {', '.join(self.graders)}"
            )
        return self


GraderSpec = Member | Multi | Weighted
"""Any grader."""

AnyGrader = Annotated[GraderSpec, Field(discriminator="type")]

KINDS: tuple[type[Named], ...] = (*get_args(Member), Multi, Weighted)
PARTS: tuple[type[Part], ...] = (TextPart, ImagePart, AudioPart)


def type_of(kind: type[Part]) -> tuple[str, ...]:
    """The values of `type` that lead to a class."""
    field = kind.model_fields.get("type")
    return (
        ()
        if field is None
        else tuple(value for value in get_args(field.annotation) if isinstance(value, str))
    )
