# bash completion for ringnet. Made by `ringnet completion bash`; do not edit.
_ringnet_sessions() { ringnet ctl ls --json 2>/dev/null | sed -n 's/^{"session":"\([^"]*\)".*/\1/p'; }

_ringnet() {
	local cur=${COMP_WORDS[COMP_CWORD]} path="" option="" w i skip=0 rest=0
	for ((i = 1; i < COMP_CWORD; i++)); do
		w=${COMP_WORDS[i]}
		if ((skip)); then
			skip=0
			option=""
			continue
		fi
		case "$path|$w" in
		"run|--config" | "run|-m" | "run|--mtu" | "run|-a" | "run|--address" | "run|-n" | "run|--netmask" | "run|-g" | "run|--gateway" | "run|--mac" | "run|-D" | "run|--dns" | "run|-S" | "run|--search" | "run|--hosts" | "run|-t" | "run|--tcp-ports" | "run|-u" | "run|--udp-ports" | "run|--policy" | "run|--proxy" | "run|--no-proxy" | "run|--udp-without-proxy" | "run|-p" | "run|--pcap" | "run|--session" | "run|--api-socket" | "run|-P" | "run|--pid" | "run|-I" | "run|--ifname" | "run|--resolv-conf" | "run|--lease-file" | "run|--udp-max" | "run|--pending-max" | "run|--peek" | "run|--nic2" | "run|--route" | "run|--promote" | "run|--busy-wait" | "run|--cpus" | "run|--seed" | "run|--impair" | "run|--hold" | "run|--restarts" | "run|--watchdog" | "run|--postmortem" | "run|--metrics" | "run|--log-format" | "run|--log-level")
			skip=1
			option=$w
			continue
			;;
		"attach|--ready-fd" | "attach|--exit-fd" | "attach|--config" | "attach|-m" | "attach|--mtu" | "attach|-a" | "attach|--address" | "attach|-n" | "attach|--netmask" | "attach|-g" | "attach|--gateway" | "attach|--mac" | "attach|-D" | "attach|--dns" | "attach|-S" | "attach|--search" | "attach|--hosts" | "attach|-t" | "attach|--tcp-ports" | "attach|-u" | "attach|--udp-ports" | "attach|--policy" | "attach|--proxy" | "attach|--no-proxy" | "attach|--udp-without-proxy" | "attach|-p" | "attach|--pcap" | "attach|--session" | "attach|--api-socket" | "attach|-P" | "attach|--pid" | "attach|-I" | "attach|--ifname" | "attach|--tap" | "attach|--resolv-conf" | "attach|--lease-file" | "attach|--udp-max" | "attach|--pending-max" | "attach|--peek" | "attach|--nic2" | "attach|--route" | "attach|--promote" | "attach|--busy-wait" | "attach|--cpus" | "attach|--seed" | "attach|--impair" | "attach|--hold" | "attach|--restarts" | "attach|--watchdog" | "attach|--postmortem" | "attach|--metrics" | "attach|--log-format" | "attach|--log-level")
			skip=1
			option=$w
			continue
			;;
		"vm|--type" | "vm|--socket" | "vm|--fd" | "vm|--nic2-socket" | "vm|--nic2-fd" | "vm|--ready-fd" | "vm|--exit-fd" | "vm|--config" | "vm|-m" | "vm|--mtu" | "vm|-a" | "vm|--address" | "vm|-n" | "vm|--netmask" | "vm|-g" | "vm|--gateway" | "vm|--mac" | "vm|-D" | "vm|--dns" | "vm|-S" | "vm|--search" | "vm|--hosts" | "vm|-t" | "vm|--tcp-ports" | "vm|-u" | "vm|--udp-ports" | "vm|--policy" | "vm|--proxy" | "vm|--no-proxy" | "vm|--udp-without-proxy" | "vm|-p" | "vm|--pcap" | "vm|--session" | "vm|--api-socket" | "vm|-P" | "vm|--pid" | "vm|-I" | "vm|--ifname" | "vm|--resolv-conf" | "vm|--lease-file" | "vm|--udp-max" | "vm|--pending-max" | "vm|--peek" | "vm|--nic2" | "vm|--route" | "vm|--promote" | "vm|--busy-wait" | "vm|--cpus" | "vm|--seed" | "vm|--impair" | "vm|--hold" | "vm|--restarts" | "vm|--watchdog" | "vm|--postmortem" | "vm|--metrics" | "vm|--log-format" | "vm|--log-level")
			skip=1
			option=$w
			continue
			;;
		"ctl|-s" | "ctl|--session" | "ctl|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl ls|-s" | "ctl ls|--session" | "ctl ls|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl status|-s" | "ctl status|--session" | "ctl status|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl stages|-s" | "ctl stages|--session" | "ctl stages|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl statistics|-s" | "ctl statistics|--session" | "ctl statistics|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl forward|-s" | "ctl forward|--session" | "ctl forward|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl forward add|-s" | "ctl forward add|--session" | "ctl forward add|--api-socket" | "ctl forward add|--owner")
			skip=1
			option=$w
			continue
			;;
		"ctl forward ls|-s" | "ctl forward ls|--session" | "ctl forward ls|--api-socket" | "ctl forward ls|--owner")
			skip=1
			option=$w
			continue
			;;
		"ctl forward rm|-s" | "ctl forward rm|--session" | "ctl forward rm|--api-socket" | "ctl forward rm|--owner")
			skip=1
			option=$w
			continue
			;;
		"ctl forward replace|-s" | "ctl forward replace|--session" | "ctl forward replace|--api-socket" | "ctl forward replace|--owner" | "ctl forward replace|-t" | "ctl forward replace|--tcp-ports" | "ctl forward replace|-u" | "ctl forward replace|--udp-ports")
			skip=1
			option=$w
			continue
			;;
		"ctl hosts|-s" | "ctl hosts|--session" | "ctl hosts|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl hosts add|-s" | "ctl hosts add|--session" | "ctl hosts add|--api-socket" | "ctl hosts add|--domain" | "ctl hosts add|--owner")
			skip=1
			option=$w
			continue
			;;
		"ctl hosts replace|-s" | "ctl hosts replace|--session" | "ctl hosts replace|--api-socket" | "ctl hosts replace|--domain" | "ctl hosts replace|--owner")
			skip=1
			option=$w
			continue
			;;
		"ctl hosts ls|-s" | "ctl hosts ls|--session" | "ctl hosts ls|--api-socket" | "ctl hosts ls|--owner")
			skip=1
			option=$w
			continue
			;;
		"ctl hosts rm|-s" | "ctl hosts rm|--session" | "ctl hosts rm|--api-socket" | "ctl hosts rm|--domain" | "ctl hosts rm|--owner")
			skip=1
			option=$w
			continue
			;;
		"ctl flows|-s" | "ctl flows|--session" | "ctl flows|--api-socket" | "ctl flows|--proto")
			skip=1
			option=$w
			continue
			;;
		"ctl close|-s" | "ctl close|--session" | "ctl close|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl policy|-s" | "ctl policy|--session" | "ctl policy|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl policy ls|-s" | "ctl policy ls|--session" | "ctl policy ls|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl policy replace|-s" | "ctl policy replace|--session" | "ctl policy replace|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl hold|-s" | "ctl hold|--session" | "ctl hold|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl release|-s" | "ctl release|--session" | "ctl release|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl pause|-s" | "ctl pause|--session" | "ctl pause|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl step|-s" | "ctl step|--session" | "ctl step|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl resume|-s" | "ctl resume|--session" | "ctl resume|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl impair|-s" | "ctl impair|--session" | "ctl impair|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl impair set|-s" | "ctl impair set|--session" | "ctl impair set|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl impair ls|-s" | "ctl impair ls|--session" | "ctl impair ls|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl impair rm|-s" | "ctl impair rm|--session" | "ctl impair rm|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl latency|-s" | "ctl latency|--session" | "ctl latency|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl dump|-s" | "ctl dump|--session" | "ctl dump|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl log|-s" | "ctl log|--session" | "ctl log|--api-socket" | "ctl log|--stage")
			skip=1
			option=$w
			continue
			;;
		"ctl events|-s" | "ctl events|--session" | "ctl events|--api-socket" | "ctl events|--count")
			skip=1
			option=$w
			continue
			;;
		"ctl cancel|-s" | "ctl cancel|--session" | "ctl cancel|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"ctl start|-s" | "ctl start|--session" | "ctl start|--api-socket")
			skip=1
			option=$w
			continue
			;;
		"capture|-s" | "capture|--session" | "capture|--api-socket" | "capture|-w" | "capture|--write" | "capture|--host" | "capture|--port" | "capture|--proto" | "capture|--flow" | "capture|--snaplen" | "capture|-c" | "capture|--count" | "capture|--file-size" | "capture|--files" | "capture|--buffer")
			skip=1
			option=$w
			continue
			;;
		"bench|-m" | "bench|--mtu" | "bench|--secs" | "bench|--only")
			skip=1
			option=$w
			continue
			;;
		"top|-s" | "top|--session" | "top|--api-socket" | "top|-i" | "top|--interval" | "top|-n" | "top|--count" | "top|--sort" | "top|--flows")
			skip=1
			option=$w
			continue
			;;
		"flows|-s" | "flows|--session" | "flows|--api-socket" | "flows|--proto" | "flows|--host" | "flows|--port" | "flows|--sort" | "flows|-n" | "flows|--most" | "flows|-i" | "flows|--interval")
			skip=1
			option=$w
			continue
			;;
		"explain|-s" | "explain|--session" | "explain|--api-socket" | "explain|-n" | "explain|--last")
			skip=1
			option=$w
			continue
			;;
		"postmortem|-n" | "postmortem|--last")
			skip=1
			option=$w
			continue
			;;
		"passt|-s" | "passt|--socket" | "passt|-F" | "passt|--fd" | "passt|-t" | "passt|--tcp-ports" | "passt|-u" | "passt|--udp-ports" | "passt|-D" | "passt|--dns" | "passt|-m" | "passt|--mtu" | "passt|-a" | "passt|--address" | "passt|-n" | "passt|--netmask" | "passt|-g" | "passt|--gateway" | "passt|-P" | "passt|--pid" | "passt|-p" | "passt|--pcap")
			skip=1
			option=$w
			continue
			;;
		"slirp4netns|-e" | "slirp4netns|--exit-fd" | "slirp4netns|-r" | "slirp4netns|--ready-fd" | "slirp4netns|-m" | "slirp4netns|--mtu" | "slirp4netns|--cidr" | "slirp4netns|--netns-type" | "slirp4netns|-6" | "slirp4netns|--enable-ipv6" | "slirp4netns|-a" | "slirp4netns|--api-socket" | "slirp4netns|--enable-sandbox" | "slirp4netns|--enable-seccomp" | "slirp4netns|--outbound-addr" | "slirp4netns|--outbound-addr6" | "slirp4netns|--disable-dns" | "slirp4netns|--macaddress" | "slirp4netns|--userns-path" | "slirp4netns|--target-type")
			skip=1
			option=$w
			continue
			;;
		"nic2-helper|--nic2" | "nic2-helper|--route" | "nic2-helper|--user")
			skip=1
			option=$w
			continue
			;;
		esac
		case "${path:+$path }$w" in
		"run" | "attach" | "vm" | "demo" | "ctl" | "ctl ls" | "ctl status" | "ctl stages" | "ctl statistics" | "ctl forward" | "ctl forward add" | "ctl forward ls" | "ctl forward rm" | "ctl forward replace" | "ctl hosts" | "ctl hosts add" | "ctl hosts replace" | "ctl hosts ls" | "ctl hosts rm" | "ctl flows" | "ctl close" | "ctl policy" | "ctl policy ls" | "ctl policy replace" | "ctl hold" | "ctl release" | "ctl pause" | "ctl step" | "ctl resume" | "ctl impair" | "ctl impair set" | "ctl impair ls" | "ctl impair rm" | "ctl latency" | "ctl dump" | "ctl log" | "ctl events" | "ctl cancel" | "ctl start" | "capture" | "doctor" | "bench" | "top" | "flows" | "explain" | "postmortem" | "passt" | "slirp4netns" | "completion" | "nic2-helper" | "stage") path="${path:+$path }$w" ;;
		"run "[!-]* | "run --") rest=1 ;;
		esac
	done
	COMPREPLY=()
	if ((rest)); then
		mapfile -t COMPREPLY < <(compgen -c -f -- "$cur")
		return
	fi
	if ((skip)); then
		case "$path|$option" in
		"run|--config" | "run|-p" | "run|--pcap" | "run|--api-socket" | "run|-P" | "run|--pid" | "run|--resolv-conf" | "run|--lease-file") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"attach|--config" | "attach|-p" | "attach|--pcap" | "attach|--api-socket" | "attach|-P" | "attach|--pid" | "attach|--resolv-conf" | "attach|--lease-file") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"vm|--type") mapfile -t COMPREPLY < <(compgen -W "qemu-stream qemu-dgram vfkit fd" -- "$cur") ;;
		"vm|--socket" | "vm|--nic2-socket" | "vm|--config" | "vm|-p" | "vm|--pcap" | "vm|--api-socket" | "vm|-P" | "vm|--pid" | "vm|--resolv-conf" | "vm|--lease-file") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl|-s" | "ctl|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl ls|-s" | "ctl ls|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl ls|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl status|-s" | "ctl status|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl status|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl stages|-s" | "ctl stages|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl stages|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl statistics|-s" | "ctl statistics|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl statistics|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl forward|-s" | "ctl forward|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl forward|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl forward add|-s" | "ctl forward add|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl forward add|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl forward ls|-s" | "ctl forward ls|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl forward ls|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl forward rm|-s" | "ctl forward rm|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl forward rm|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl forward replace|-s" | "ctl forward replace|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl forward replace|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl hosts|-s" | "ctl hosts|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl hosts|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl hosts add|-s" | "ctl hosts add|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl hosts add|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl hosts replace|-s" | "ctl hosts replace|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl hosts replace|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl hosts ls|-s" | "ctl hosts ls|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl hosts ls|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl hosts rm|-s" | "ctl hosts rm|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl hosts rm|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl flows|-s" | "ctl flows|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl flows|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl flows|--proto") mapfile -t COMPREPLY < <(compgen -W "tcp udp icmp" -- "$cur") ;;
		"ctl close|-s" | "ctl close|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl close|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl policy|-s" | "ctl policy|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl policy|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl policy ls|-s" | "ctl policy ls|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl policy ls|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl policy replace|-s" | "ctl policy replace|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl policy replace|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl hold|-s" | "ctl hold|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl hold|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl release|-s" | "ctl release|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl release|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl pause|-s" | "ctl pause|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl pause|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl step|-s" | "ctl step|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl step|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl resume|-s" | "ctl resume|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl resume|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl impair|-s" | "ctl impair|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl impair|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl impair set|-s" | "ctl impair set|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl impair set|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl impair ls|-s" | "ctl impair ls|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl impair ls|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl impair rm|-s" | "ctl impair rm|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl impair rm|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl latency|-s" | "ctl latency|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl latency|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl dump|-s" | "ctl dump|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl dump|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl log|-s" | "ctl log|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl log|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl events|-s" | "ctl events|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl events|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl cancel|-s" | "ctl cancel|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl cancel|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"ctl start|-s" | "ctl start|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"ctl start|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"capture|-s" | "capture|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"capture|--api-socket" | "capture|-w" | "capture|--write") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"capture|--proto") mapfile -t COMPREPLY < <(compgen -W "tcp udp icmp" -- "$cur") ;;
		"top|-s" | "top|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"top|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"top|--sort") mapfile -t COMPREPLY < <(compgen -W "rate bytes age idle rtt retransmits" -- "$cur") ;;
		"flows|-s" | "flows|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"flows|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"flows|--proto") mapfile -t COMPREPLY < <(compgen -W "tcp udp icmp" -- "$cur") ;;
		"flows|--sort") mapfile -t COMPREPLY < <(compgen -W "rate bytes age idle rtt retransmits" -- "$cur") ;;
		"explain|-s" | "explain|--session") mapfile -t COMPREPLY < <(compgen -W "$(_ringnet_sessions)" -- "$cur") ;;
		"explain|--api-socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"passt|-s" | "passt|--socket") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"passt|-P" | "passt|--pid" | "passt|-p" | "passt|--pcap") mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
		"slirp4netns|--netns-type") mapfile -t COMPREPLY < <(compgen -W "pid path" -- "$cur") ;;
		esac
		return
	fi
	case "$path" in
	"") mapfile -t COMPREPLY < <(compgen -W "run attach vm demo ctl capture doctor bench top flows explain postmortem passt slirp4netns completion nic2-helper stage -h --help --version" -- "$cur") ;;
	"run") mapfile -t COMPREPLY < <(compgen -c -f -W "-h --help --config -m --mtu -a --address -n --netmask -g --gateway --mac -D --dns -S --search --hosts --no-host-loopback -t --tcp-ports -u --udp-ports --forward-as-gateway --policy --no-metadata --proxy --no-proxy --udp-without-proxy -p --pcap --session --api-socket -P --pid -I --ifname --resolv-conf --lease-file --udp-max --pending-max --peek --nic2 --route --promote --busy-wait --cpus --seed --impair --hold --restarts --watchdog --postmortem --metrics --log-format --log-level --stats -q --quiet -d --debug" -- "$cur") ;;
	"attach") mapfile -t COMPREPLY < <(compgen -f -W "-h --help --config-net --ready-fd --exit-fd --config -m --mtu -a --address -n --netmask -g --gateway --mac -D --dns -S --search --hosts --no-host-loopback -t --tcp-ports -u --udp-ports --forward-as-gateway --policy --no-metadata --proxy --no-proxy --udp-without-proxy -p --pcap --session --api-socket -P --pid -I --ifname --tap --resolv-conf --lease-file --udp-max --pending-max --peek --nic2 --route --promote --busy-wait --cpus --seed --impair --hold --restarts --watchdog --postmortem --metrics --log-format --log-level --stats -q --quiet -d --debug" -- "$cur") ;;
	"vm") mapfile -t COMPREPLY < <(compgen -W "-h --help --type --socket --fd --nic2-socket --nic2-fd -1 --one-off --vnet-hdr --offloading --ready-fd --exit-fd --config -m --mtu -a --address -n --netmask -g --gateway --mac -D --dns -S --search --hosts --no-host-loopback -t --tcp-ports -u --udp-ports --forward-as-gateway --policy --no-metadata --proxy --no-proxy --udp-without-proxy -p --pcap --session --api-socket -P --pid -I --ifname --resolv-conf --lease-file --udp-max --pending-max --peek --nic2 --route --promote --busy-wait --cpus --seed --impair --hold --restarts --watchdog --postmortem --metrics --log-format --log-level --stats -q --quiet -d --debug" -- "$cur") ;;
	"demo") mapfile -t COMPREPLY < <(compgen -W "" -- "$cur") ;;
	"ctl") mapfile -t COMPREPLY < <(compgen -W "ls status stages statistics forward hosts flows close policy hold release pause step resume impair latency dump log events cancel start -h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl ls") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl status") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl stages") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl statistics") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl forward") mapfile -t COMPREPLY < <(compgen -W "add ls rm replace -h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl forward add") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json -u --udp --owner" -- "$cur") ;;
	"ctl forward ls") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json --owner" -- "$cur") ;;
	"ctl forward rm") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json -u --udp --owner --close-flows" -- "$cur") ;;
	"ctl forward replace") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json --owner -t --tcp-ports -u --udp-ports --close-flows" -- "$cur") ;;
	"ctl hosts") mapfile -t COMPREPLY < <(compgen -W "add replace ls rm -h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl hosts add") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json --domain --owner" -- "$cur") ;;
	"ctl hosts replace") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json --domain --owner" -- "$cur") ;;
	"ctl hosts ls") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json --owner" -- "$cur") ;;
	"ctl hosts rm") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json --domain --owner" -- "$cur") ;;
	"ctl flows") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json --proto" -- "$cur") ;;
	"ctl close") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl policy") mapfile -t COMPREPLY < <(compgen -W "ls replace -h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl policy ls") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl policy replace") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl hold") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl release") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl pause") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl step") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl resume") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl impair") mapfile -t COMPREPLY < <(compgen -W "set ls rm -h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl impair set") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl impair ls") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl impair rm") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl latency") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl dump") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl log") mapfile -t COMPREPLY < <(compgen -W "error warning info debug -h --help -s --session --api-socket --json --stage" -- "$cur") ;;
	"ctl events") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json --count" -- "$cur") ;;
	"ctl cancel") mapfile -t COMPREPLY < <(compgen -W "nic1 nic2 -h --help -s --session --api-socket --json" -- "$cur") ;;
	"ctl start") mapfile -t COMPREPLY < <(compgen -W "nic2 -h --help -s --session --api-socket --json" -- "$cur") ;;
	"capture") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket -w --write --host --port --proto --flow --drops --snaplen -c --count --file-size --files --buffer -q --quiet" -- "$cur") ;;
	"doctor") mapfile -t COMPREPLY < <(compgen -W "-h --help --json -q --quiet" -- "$cur") ;;
	"bench") mapfile -t COMPREPLY < <(compgen -W "-h --help -m --mtu --secs --only --json" -- "$cur") ;;
	"top") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json -i --interval -n --count --sort --flows --plain" -- "$cur") ;;
	"flows") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket --json --proto --host --port --waiting --sort -n --most -i --interval --watch" -- "$cur") ;;
	"explain") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --session --api-socket -n --last --json" -- "$cur") ;;
	"postmortem") mapfile -t COMPREPLY < <(compgen -W "-h --help -n --last --json" -- "$cur") ;;
	"passt") mapfile -t COMPREPLY < <(compgen -W "-h --help -s --socket -F --fd -1 --one-off -f --foreground -t --tcp-ports -u --udp-ports -D --dns -m --mtu -a --address -n --netmask -g --gateway -P --pid -p --pcap -q --quiet -d --debug -e --stderr" -- "$cur") ;;
	"slirp4netns") mapfile -t COMPREPLY < <(compgen -W "-h --help -c --configure -e --exit-fd -r --ready-fd -m --mtu --cidr --disable-host-loopback --netns-type -6 --enable-ipv6 -a --api-socket --enable-sandbox --enable-seccomp --outbound-addr --outbound-addr6 --disable-dns --macaddress --userns-path --target-type" -- "$cur") ;;
	"completion") mapfile -t COMPREPLY < <(compgen -W "bash zsh -h --help" -- "$cur") ;;
	"nic2-helper") mapfile -t COMPREPLY < <(compgen -W "-h --help --nic2 --route --user" -- "$cur") ;;
	"stage") mapfile -t COMPREPLY < <(compgen -W "-h --help" -- "$cur") ;;
	esac
}
complete -F _ringnet ringnet
