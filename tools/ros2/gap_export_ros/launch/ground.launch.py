"""Starts the node, and brings it from unconfigured to active."""

from __future__ import annotations

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, EmitEvent, RegisterEventHandler
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterValue
from lifecycle_msgs.msg import Transition

ARGUMENTS = {
    "bundle": ("", "Folder of the bundle."),
    "image": ("/camera/image_raw", "Topic of the images."),
    "compressed": ("false", "Whether they are sensor_msgs/CompressedImage."),
    "expressions": ("['']", "What to look for, as a list in YAML."),
    "backend": ("onnxruntime", "onnxruntime, openvino or tensorrt."),
}


def generate_launch_description() -> LaunchDescription:
    """What ``ros2 launch gap_export_ros ground.launch.py bundle:=FOLDER`` starts."""
    node = LifecycleNode(
        package="gap_export_ros",
        executable="ground",
        name="ground",
        namespace="",
        output="screen",
        remappings=[("image", LaunchConfiguration("image"))],
        parameters=[
            {
                "bundle": ParameterValue(LaunchConfiguration("bundle"), value_type=str),
                "backend": ParameterValue(LaunchConfiguration("backend"), value_type=str),
                "compressed": ParameterValue(LaunchConfiguration("compressed"), value_type=bool),
                "expressions": ParameterValue(
                    LaunchConfiguration("expressions"), value_type=list[str]
                ),
            }
        ],
    )

    def change(transition: int) -> EmitEvent:
        matcher = matches_action(node)
        event = ChangeState(lifecycle_node_matcher=matcher, transition_id=transition)
        return EmitEvent(event=event)

    activate = RegisterEventHandler(
        OnStateTransition(
            target_lifecycle_node=node,
            goal_state="inactive",
            entities=[change(Transition.TRANSITION_ACTIVATE)],
        )
    )
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=text)
        for name, (default, text) in ARGUMENTS.items()
    ]
    return LaunchDescription([*arguments, activate, node, change(Transition.TRANSITION_CONFIGURE)])
