# frozen_string_literal: true

# A Vagrantfile that gives vagrant one more command: `vagrant machines FOLDER...` prints as JSON what Vagrant makes of the
# Vagrantfile in each folder, by folder, machine and provider. See real_vagrant.py.

require "json"

class Machines < Vagrant.plugin("2", :command)
  def execute
    puts JSON.generate(@argv.to_h { |folder| [folder, machines(folder)] })
    0
  end

  private

  def machines(folder)
    env = Vagrant::Environment.new(
      cwd: folder, home_path: @env.home_path, local_data_path: @env.local_data_path, vagrantfile_name: ["Vagrantfile"],
      ui_class: Vagrant::UI::Silent,
    )
    env.machine_names.to_h { |name| [name, %i[libvirt virtualbox].to_h { |to| [to, described(env.machine(name, to))] }] }
  rescue Vagrant::Errors::VagrantError, NameError => e
    { "refused" => e.message }
  end

  def described(machine)
    vm = machine.config.vm
    {
      faults: machine.config.validate(machine).values.flatten,
      box: vm.box,
      hostname: vm.hostname,
      hardware: hardware(machine),
      synced_folders: vm.synced_folders.values.reject { |folder| folder[:disabled] },
      networks: vm.networks,
      provision: vm.provisioners.map { |p| { type: p.type, script: p.config.inline, as_root: p.config.privileged } },
    }
  end

  # VirtualBox keeps memory and cpus as the arguments of VBoxManage that they stand for.
  def hardware(machine)
    provider = machine.provider_config
    return { memory: provider.memory, cpus: provider.cpus } unless machine.provider_name == :virtualbox

    given = provider.customizations.filter_map { |_, (what, _, flag, value)| [flag, value.to_i] if what == "modifyvm" }
    { memory: given.to_h["--memory"], cpus: given.to_h["--cpus"] }
  end
end

class MachinesPlugin < Vagrant.plugin("2")
  name "lsmlab's tests"
  command("machines") { Machines }
end
