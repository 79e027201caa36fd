"""The node ``ground``: images in, ``vision_msgs/Detection2DArray`` with the same header out.

It is the thin part: decoding, answering and counting are ``gap_export.streaming.ros``, which knows
no ROS. Runs on Humble's Python 3.10 with the base install of gap-export.

    topics      image              sensor_msgs/Image, or CompressedImage with ``compressed``
                ~/expressions      std_msgs/String, one expression a line; replaces the parameter's
                ~/detections       vision_msgs/Detection2DArray
                /diagnostics       diagnostic_msgs/DiagnosticArray, once a second
    parameters  bundle, backend, compressed, expressions, num_threads (0: all)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import SetParametersResult
from rclpy.lifecycle import LifecycleNode, State, TransitionCallbackReturn
from rclpy.qos import QoSDurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String
from vision_msgs.msg import Detection2DArray

from gap_export import GapExportError, GroundingSession
from gap_export.streaming.ros import NewestAnswerer, build_detections, parse_expressions

# An expression that was sent once reaches a node that starts later.
LATCHED = QoSProfile(depth=1, durability=QoSDurabilityPolicy.TRANSIENT_LOCAL)
NO_EXPRESSIONS = [""]


class GroundNode(LifecycleNode):
    """Configured, the bundle is open; active, images are answered, the newest one each time."""

    def __init__(self, **options: Any) -> None:
        """Declare the parameters; nothing is opened yet."""
        super().__init__("ground", **options)
        self.declare_parameter("bundle", "")
        self.declare_parameter("backend", "onnxruntime")
        self.declare_parameter("compressed", False)
        # A list that is empty has no type in ROS.
        self.declare_parameter("expressions", NO_EXPRESSIONS)
        self.declare_parameter("num_threads", 0)
        self.add_on_set_parameters_callback(self._on_parameters)
        self._expressions: tuple[str, ...] = ()
        self._session: GroundingSession | None = None
        self._answerer: NewestAnswerer | None = None
        self._made: list[tuple[Any, Any]] = []

    def on_configure(self, state: State) -> TransitionCallbackReturn:
        """Open the bundle and make the publishers."""
        del state
        try:
            self._expressions = _expressions_of(self._value("expressions"))
            self._session = GroundingSession.open(
                self._value("bundle"),
                backend=self._value("backend"),
                num_threads=self._value("num_threads") or None,
            )
        except GapExportError as err:
            self.get_logger().error(str(err))
            return TransitionCallbackReturn.FAILURE
        self._detections = self.create_lifecycle_publisher(
            Detection2DArray, "~/detections", qos_profile_sensor_data
        )
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        words = self.create_subscription(String, "~/expressions", self._on_words, LATCHED)
        timer = self.create_timer(1.0, self._diagnose)
        self._made = [
            (self.destroy_publisher, self._detections),
            (self.destroy_publisher, self._diagnostics),
            (self.destroy_subscription, words),
            (self.destroy_timer, timer),
        ]
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: State) -> TransitionCallbackReturn:
        """Begin to answer images."""
        assert self._session is not None
        self._answerer = NewestAnswerer(
            self._session,
            self._publish,
            expressions=self._expressions,
            report=lambda text: self.get_logger().error(text, throttle_duration_sec=5.0),
        )
        kind = CompressedImage if self._value("compressed") else Image
        self._images = self.create_subscription(
            kind, "image", self._answerer.offer, qos_profile_sensor_data
        )
        if not self._expressions:
            self.get_logger().warning("no expression yet: images are dropped")
        return super().on_activate(state)

    def on_deactivate(self, state: State) -> TransitionCallbackReturn:
        """End: the image that is being answered is answered."""
        self._stop()
        return super().on_deactivate(state)

    def on_cleanup(self, state: State) -> TransitionCallbackReturn:
        """Close the bundle."""
        del state
        self.free()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: State) -> TransitionCallbackReturn:
        """Close the bundle, from any state."""
        del state
        self.free()
        return TransitionCallbackReturn.SUCCESS

    def _value(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _publish(self, header: Any, groundings: list[Any]) -> None:
        self._detections.publish(build_detections(find_type, header, groundings))

    def _on_words(self, message: String) -> None:
        try:
            self._look_for(parse_expressions(message.data))
        except GapExportError as err:
            self.get_logger().error(str(err))

    def _on_parameters(self, parameters: list[Any]) -> SetParametersResult:
        for parameter in parameters:
            if parameter.name == "expressions":
                self._look_for(_expressions_of(parameter.value))
            elif self._session is not None:
                reason = f"{parameter.name} is read when the node is configured: clean it up first"
                return SetParametersResult(successful=False, reason=reason)
        return SetParametersResult(successful=True)

    def _look_for(self, expressions: tuple[str, ...]) -> None:
        self._expressions = expressions
        if self._answerer is not None:
            self._answerer.set_expressions(expressions)

    def _diagnose(self) -> None:
        status = DiagnosticStatus(name=f"{self.get_name()}: answers", hardware_id="")
        if self._answerer is None:
            status.level, status.message = DiagnosticStatus.OK, "not active"
        else:
            seen = self._answerer.status
            status.level, status.message = DiagnosticStatus.OK, "answering"
            if seen.last_error is not None:
                status.level, status.message = DiagnosticStatus.ERROR, seen.last_error
            elif not self._expressions:
                status.level, status.message = DiagnosticStatus.WARN, "no expression"
            elif not seen.received:
                status.level, status.message = DiagnosticStatus.WARN, "no image yet"
            counts = {
                "received": seen.received,
                "answered": seen.answered,
                "dropped for a newer one": seen.dropped,
                "failed": seen.failed,
                "milliseconds of the last": round(seen.last_ms or 0.0, 1),
                "expressions": "; ".join(self._expressions),
            }
            status.values = [KeyValue(key=key, value=str(value)) for key, value in counts.items()]
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)

    def _stop(self) -> None:
        if self._answerer is not None:
            self.destroy_subscription(self._images)
            answerer, self._answerer = self._answerer, None
            if not answerer.close():
                self.get_logger().error("the last image is still being answered")

    def free(self) -> None:
        """Close all that was opened."""
        self._stop()
        for destroy, made in self._made:
            destroy(made)
        self._made = []
        if self._session is not None:
            self._session.close()
            self._session = None


def find_type(name: str) -> Any:
    """The class of a message, such as ``vision_msgs/msg/Detection2D``."""
    package, _, kind = name.rpartition("/")
    return getattr(import_module(package.replace("/", ".")), kind)


def _expressions_of(value: list[str]) -> tuple[str, ...]:
    return tuple(text.strip() for text in value if text.strip())


def main(args: list[str] | None = None) -> None:
    """Run the node until it is told to end."""
    rclpy.init(args=args)
    node = GroundNode()
    try:
        rclpy.spin(node)
    except KeyboardInterrupt:
        pass
    finally:
        node.free()
        node.destroy_node()
        rclpy.try_shutdown()
