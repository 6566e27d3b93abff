# shellcheck shell=bash
# The virtual machine of the tests: Debian's cloud kernel, its virtio modules and a static busybox, in build/guest.
#
# The packages are fetched and unpacked, not installed: a kernel among the host's would become its next one to boot. Sourced
# behind setup.sh, whose say, die, step and as_root it uses. x86-64 only, as the tests that need it (tests/vmlab.py).

GUEST_MODULES="virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci failover net_failover virtio_net"

fetch_guest() { # part of a condition, as all that step runs: every line says what a failure means
	local work kernel deb module found
	work=$(mktemp -d build/guest.XXXXXX) || return
	chmod 755 "$work"
	kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-.*-cloud-amd64\)$/\1/p')
	if [ -z "$kernel" ]; then
		as_root apt-get -q -o DPkg::Lock::Timeout=300 update || return
		kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-.*-cloud-amd64\)$/\1/p')
	fi
	[ -n "$kernel" ] || { echo "no package linux-image-cloud-amd64"; return 1; }
	# The lists may be older than what the archive still has.
	(cd "$work" && { apt-get -q download "$kernel" busybox-static ||
		{ as_root apt-get -q -o DPkg::Lock::Timeout=300 update && apt-get -q download "$kernel" busybox-static; }; }) || return
	for deb in "$work"/*.deb; do
		dpkg-deb -x "$deb" "$work/root" || return
	done
	mkdir "$work/guest" || return
	cp "$work"/root/boot/vmlinuz-* "$work/guest/vmlinuz" || return
	cp "$work/root/bin/busybox" "$work/guest/busybox" || return
	for module in $GUEST_MODULES; do
		found=$(find "$work/root/lib/modules" -name "$module.ko")
		[ -n "$found" ] || { echo "$kernel has no module $module"; return 1; }
		cp "$found" "$work/guest/" || return
	done
	rm -rf build/guest && mv "$work/guest" build/guest || return
	rm -rf "$work"
}

# prepare_guest: in the checkout's directory.
prepare_guest() {
	[ "$(uname -m)" = x86_64 ] || return 0
	[ ! -e build/guest/virtio_net.ko ] || return 0
	command -v apt-get >/dev/null || die "no apt-get: put vmlinuz, busybox and $GUEST_MODULES (.ko) into build/guest"
	mkdir -p build
	exec 8>build/guest.lock
	flock 8
	[ -e build/guest/virtio_net.ko ] || step "fetching the kernel of the tests' virtual machine (apt-get download)" fetch_guest
	exec 8>&-
}
