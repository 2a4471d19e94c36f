"""What can be told about an invented lighthouse, for tasks with quotes and for reports."""

from dataclasses import dataclass

from dgrpo.longblocks.tasks.facts import Names


@dataclass(frozen=True)
class Attribute:
    """One property; a number in [low, high), or a name."""

    key: str  # a word of the sentence that stands for the property
    section: str  # heading under which a report tells it
    sentence: str  # of {x}, the lighthouse, and {v}, the value
    question: str  # of {x}
    low: int = 0
    high: int = 0


# fmt: off
ATTRIBUTES = tuple(Attribute(*fields) for fields in (
    ("tall", "Building", "The tower of the {x} lighthouse is {v} feet tall.",
     "How many feet tall is the tower of the {x} lighthouse?", 31, 400),
    ("days", "Building", "The building of the {x} lighthouse took {v} days.",
     "How many days did the building of the {x} lighthouse take?", 401, 900),
    ("steps", "Building", "The stair of the {x} lighthouse has {v} steps.",
     "How many steps does the stair of the {x} lighthouse have?", 901, 1400),
    ("crowns", "Building", "The work on the {x} lighthouse cost {v} crowns.",
     "How many crowns did the work on the {x} lighthouse cost?", 10_000, 99_999),
    ("candles", "Light", "The lamp of the {x} lighthouse is as bright as {v} candles.",
     "As bright as how many candles is the lamp of the {x} lighthouse?", 500_000, 999_999),
    ("barrels", "Light", "The lamp of the {x} lighthouse burns {v} barrels of oil in a year.",
     "How many barrels of oil does the lamp of the {x} lighthouse burn in a year?", 1401, 2400),
    ("hours", "Light", "The lamp of the {x} lighthouse was lit for {v} hours last year.",
     "For how many hours was the lamp of the {x} lighthouse lit last year?", 2401, 4000),
    ("kilograms", "Light", "The fog bell of the {x} lighthouse weighs {v} kilograms.",
     "How many kilograms does the fog bell of the {x} lighthouse weigh?", 4001, 8000),
    ("keeper", "People", "The keeper of the {x} lighthouse is called {v}.",
     "What is the keeper of the {x} lighthouse called?"),
    ("inspector", "People", "The inspector of the {x} lighthouse is called {v}.",
     "What is the inspector of the {x} lighthouse called?"),
    ("boat", "People", "The boat of the {x} lighthouse is called the {v}.",
     "What is the boat of the {x} lighthouse called?"),
    ("visitors", "People", "The {x} lighthouse had {v} visitors in its best year.",
     "How many visitors did the {x} lighthouse have in its best year?", 100_000, 400_000),
))
# fmt: on
INTROS = (
    "The {x} lighthouse stands on a rock before the coast.",
    "Sailors have known the {x} lighthouse for a long time.",
    "Some things about the {x} lighthouse were written down.",
    "The {x} lighthouse has a file of its own in the archive.",
)


def value(attribute: Attribute, names: Names) -> str:
    """A value that no other attribute of the document has."""
    if attribute.high:
        return str(names.number(attribute.low, attribute.high))
    return names.place() if attribute.key == "boat" else names.person()


def intro(place: str, names: Names) -> str:
    """A first sentence that says nothing of use."""
    return names.choose(INTROS).format(x=place)
