# SPDX-License-Identifier: Apache-2.0
"""The lab: a disposable Linux host with real KVM, on machines that have none."""
