"""What a node uses of ROS 2, without ROS 2: modules by their names, and a board of topics.

Message classes are rosbags' own, of the real definitions, with defaults for what is left out, as
rclpy has them. A parameter has the type of its default, and an empty list has none: as in ROS.
"""

from __future__ import annotations

import sys
import types
from enum import Enum
from types import SimpleNamespace
from typing import Any

from rosbags.convert.converter import default_message
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from gap_export.streaming.ros.detections import ROS2_DEFINITIONS

STORE = get_typestore(Stores.ROS2_HUMBLE)
for _name, _text in ROS2_DEFINITIONS.items():
    STORE.register(get_types_from_msg(_text, _name))

PACKAGES = ("diagnostic_msgs", "geometry_msgs", "sensor_msgs", "std_msgs", "vision_msgs")


def message_class(name: str) -> Any:
    """A class that takes its fields by name, as rclpy's do, and refuses others."""
    cls = STORE.types[name]

    def make(**values: Any) -> Any:
        message = default_message(STORE, name)
        for field, value in values.items():
            assert field in cls.__dataclass_fields__, f"{name} has no {field}"
            setattr(message, field, value)
        return message

    constants = {n: getattr(cls, n) for n in dir(cls) if n.isupper()}
    return type(name, (), {"__new__": lambda _, **values: make(**values), **constants})


class Transition(Enum):
    """rclpy.lifecycle.TransitionCallbackReturn."""

    SUCCESS = 1
    FAILURE = 2


class Log:
    """The log of a node: what was said, by level."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def __getattr__(self, level: str) -> Any:
        return lambda text, **options: self.said.append((level, text))


class Publisher:
    def __init__(self, node: Node, kind: Any, topic: str, qos: Any, *, managed: bool) -> None:
        self.node, self.kind, self.topic, self.qos = node, kind, topic, qos
        self.managed, self.sent = managed, []

    def publish(self, message: Any) -> None:
        # A managed publisher is silent unless its node is active.
        if self.node.is_active or not self.managed:
            self.sent.append(message)


class Node:
    """rclpy.lifecycle.LifecycleNode, as far as it is used."""

    def __init__(self, name: str) -> None:
        self.name, self.log, self.is_active = name, Log(), False
        self.parameters: dict[str, Any] = {}
        self.publishers: dict[str, Publisher] = {}
        self.subscriptions: dict[str, SimpleNamespace] = {}
        self.timers: list[Any] = []
        self.check: Any = None

    def declare_parameter(self, name: str, default: Any) -> None:
        assert default != [], "an empty list has no type"
        self.parameters.setdefault(name, default)

    def get_parameter(self, name: str) -> Any:
        return SimpleNamespace(value=self.parameters[name])

    def add_on_set_parameters_callback(self, callback: Any) -> None:
        self.check = callback

    def set(self, name: str, value: Any) -> Any:
        result = self.check([SimpleNamespace(name=name, value=value)])
        if result.successful:
            self.parameters[name] = value
        return result

    def create_publisher(self, kind: Any, topic: str, qos: Any) -> Publisher:
        return self.publishers.setdefault(topic, Publisher(self, kind, topic, qos, managed=False))

    def create_lifecycle_publisher(self, kind: Any, topic: str, qos: Any) -> Publisher:
        return self.publishers.setdefault(topic, Publisher(self, kind, topic, qos, managed=True))

    def create_subscription(self, kind: Any, topic: str, callback: Any, qos: Any) -> Any:
        made = SimpleNamespace(kind=kind, topic=topic, callback=callback, qos=qos)
        self.subscriptions[topic] = made
        return made

    def create_timer(self, period_s: float, callback: Any) -> Any:
        self.timers.append(callback)
        return callback

    def destroy_publisher(self, made: Publisher) -> None:
        del self.publishers[made.topic]

    def destroy_subscription(self, made: Any) -> None:
        del self.subscriptions[made.topic]

    def destroy_timer(self, made: Any) -> None:
        self.timers.remove(made)

    def destroy_node(self) -> None:
        assert not self.timers and not self.subscriptions

    def on_activate(self, state: Any) -> Transition:
        self.is_active = True
        return Transition.SUCCESS

    def on_deactivate(self, state: Any) -> Transition:
        self.is_active = False
        return Transition.SUCCESS

    def get_logger(self) -> Log:
        return self.log

    def get_name(self) -> str:
        return self.name

    def get_clock(self) -> Any:
        stamp = STORE.types["builtin_interfaces/msg/Time"](sec=3, nanosec=4)
        return SimpleNamespace(now=lambda: SimpleNamespace(to_msg=lambda: stamp))


def modules() -> dict[str, types.ModuleType]:
    """All that the node imports of ROS, by name."""
    found: dict[str, types.ModuleType] = {}

    def add(name: str, **values: Any) -> None:
        module = types.ModuleType(name)
        vars(module).update(values)
        found[name] = module

    add("rclpy", init=lambda args: None, spin=lambda node: None, try_shutdown=lambda: None)
    add("rclpy.lifecycle", LifecycleNode=Node, State=object, TransitionCallbackReturn=Transition)
    add(
        "rclpy.qos",
        QoSProfile=SimpleNamespace,
        QoSDurabilityPolicy=SimpleNamespace(TRANSIENT_LOCAL="transient local"),
        qos_profile_sensor_data="sensor data",
    )
    add("rcl_interfaces")
    add(
        "rcl_interfaces.msg",
        SetParametersResult=lambda successful, reason="": SimpleNamespace(
            successful=successful, reason=reason
        ),
    )
    for package in PACKAGES:
        kinds = [name for name in STORE.types if name.startswith(f"{package}/msg/")]
        add(package)
        add(f"{package}.msg", **{name.rpartition("/")[2]: message_class(name) for name in kinds})
    assert not set(found) & set(sys.modules), "ROS is installed here: test with it"
    return found
