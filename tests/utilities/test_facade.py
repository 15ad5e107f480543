from abc import ABC, abstractmethod

import pytest

from lightning_unlearn.exceptions import UnsupportedStrategyError
from lightning_unlearn.utilities.facade import check_shareable, facade_class, on_same_state


class User:
    def __init__(self):
        self.value = 1

    def name(self):
        return "user"


class Wrapper:
    __slots__ = ("extra",)

    def name(self):
        return f"wrapped {super().name()}"


def facade(user):
    return on_same_state(facade_class(Wrapper, type(user)), user.__dict__)


def test_state_is_shared_both_ways_and_slots_stay_apart():
    user = User()
    wrapped = facade(user)
    wrapped.value, wrapped.extra = 2, "mine"
    user.later = 3
    assert (user.value, wrapped.later) == (2, 3)
    assert "extra" not in user.__dict__
    assert wrapped.__dict__ is user.__dict__
    del wrapped.later
    assert not hasattr(user, "later")


def test_two_facades_stand_on_one_object_with_slots_of_their_own():
    user = User()
    one, two = facade(user), facade(user)
    one.extra, two.extra = 1, 2
    assert (one.extra, two.extra) == (1, 2)
    one.value = 9
    assert two.value == 9


def test_the_wrapper_comes_first_and_the_user_next():
    wrapped = facade(User())
    assert wrapped.name() == "wrapped user"
    assert isinstance(wrapped, User)
    assert isinstance(wrapped, Wrapper)
    assert type(wrapped).__qualname__ == "User"
    assert type(wrapped)._facade_of is Wrapper


def test_a_class_is_built_once():
    assert facade_class(Wrapper, User) is facade_class(Wrapper, User)


def test_metaclasses_are_kept():
    class Abstract(ABC):
        @abstractmethod
        def name(self): ...

    class Concrete(Abstract):
        def name(self):
            return "concrete"

    assert facade(Concrete()).name() == "wrapped concrete"


def test_many_changes_of_a_shared_dict():
    user = User()
    wrapped = facade(user)
    for i in range(2000):
        setattr(wrapped if i % 2 else user, f"name{i % 7}", i)
        if i % 3 == 0:
            delattr(user if i % 2 else wrapped, f"name{i % 7}")
    assert vars(user) == vars(wrapped)
    assert vars(user)["value"] == 1


def test_state_in_slots_cannot_be_shared():
    class Slotted(User):
        __slots__ = ("hidden",)

    with pytest.raises(UnsupportedStrategyError, match=r"Slotted with __slots__"):
        check_shareable(Slotted, "model")
    check_shareable(User, "model")
